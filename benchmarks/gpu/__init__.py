"""What only a GPU can tell, and what is counted in place of one."""
