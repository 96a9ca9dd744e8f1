"""Linear sketches of vectors and their tensor powers, and the transforms and polynomials that they are made of."""
