"""Code that the strong attacks share.

This code keeps the set of the images that are still attacked, checks successes, and finds the nearest decision
boundaries.
"""
