"""What happens beside the training steps, one file each."""
