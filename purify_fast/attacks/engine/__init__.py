"""The parts that the strong attacks share: the images still attacked, the judge of a success, the nearest borders.

An attack searches on a fast copy of the model, if there is one. Whatever it takes for a success is judged again by the
model itself, in the model's own precision, and by fresh draws of a random one. Images that have fallen leave the batch.
"""
