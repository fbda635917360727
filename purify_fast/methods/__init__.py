"""The four methods of this package: CARSO, AToP, ARREST and diffusion. No method imports another method."""
