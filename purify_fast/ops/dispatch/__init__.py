"""The dispatch of ops: how they are registered, how kernels are verified and raced, and the records of this machine."""
