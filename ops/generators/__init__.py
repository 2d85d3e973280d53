"""What writes the repository's generated files: each module's ``files()`` maps a path to its whole text."""
