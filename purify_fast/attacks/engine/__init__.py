"""Code that the strong attacks share.

This code keeps the set of the images that are still attacked, checks successes, and finds the nearest decision
boundaries. An attack searches on a fast copy of the model, if a copy exists. Every success of the search is checked on
the model itself, in its own precision. If the model is random, the check takes fresh draws. An image with a confirmed
success "has fallen", and is removed from the batch.
"""
