"""Move the state of a VFIO device from one host to another while it runs, or into a file and back."""
