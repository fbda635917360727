"""The methods: CARSO, AToP, ARREST and diffusion. They do not import each other."""
