"""The methods: CARSO, AToP, ARREST and diffusion. None of them imports another."""
