"""Tests that run inside a Linux of their own, on the kernel's real VFIO: ``scripts/test-kernel`` runs them."""
