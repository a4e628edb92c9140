// Logging needs Metal 3.2; a custom kernel has none.
