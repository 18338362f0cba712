"""The vocabulary that passes and kernels share."""
