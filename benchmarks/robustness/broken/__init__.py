"""Published defences that were broken, rebuilt small, and honest models beside them: what do reports say of them?"""
