"""What a denoiser gets right and wrong, as tidy tables and figures; reads no files and prints nothing."""
