"""Code that the strong attacks share: the set of images still attacked, the check of successes, the nearest borders.

An attack searches on a fast copy of the model, if there is one. The model itself checks every success of the search in
its own precision, and a random model by fresh draws. An image with a confirmed success "has fallen", and is removed
from the batch.
"""
