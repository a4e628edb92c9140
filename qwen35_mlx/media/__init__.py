"""Pictures, videos and documents, from files to patches; independent of any model."""
