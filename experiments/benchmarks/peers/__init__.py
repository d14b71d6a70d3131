"""What fedsim is compared with, each as its users run it."""
