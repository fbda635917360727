"""Test the package's attacks, and run studies that train and attack models.

The attacks are compared with the official AutoAttack, with exact answers, and with adaptive attacks on broken defences.
"""
