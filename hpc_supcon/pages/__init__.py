"""Pages and tables of finished and unfinished runs. Reads run folders, and imports no PyTorch."""
