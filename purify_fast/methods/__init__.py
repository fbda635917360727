"""The three methods: CARSO, AToP and ARREST. They do not import each other."""
