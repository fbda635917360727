"""The dispatch of ops: registration of ops, verification and timing of kernels, and the records of this machine."""
