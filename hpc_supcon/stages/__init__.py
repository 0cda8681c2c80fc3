"""What a command runs, one file for each stage."""
