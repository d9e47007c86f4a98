"""What a Dockerfile says, and which files it may copy, as far as this project's own goes."""
