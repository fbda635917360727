"""Code that the strong attacks share: the images still attacked, the checks of successes, the nearest boundaries."""
