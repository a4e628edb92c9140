"""Pictures, videos and documents: from files to patches; knows no model."""
