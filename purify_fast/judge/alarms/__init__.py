"""The alarms, which search for signs that an attack failed for another reason than the model's robustness.

The verdict of an alarm is "passed" (no sign), "noted" (a sign, but no reason for doubt), "unreliable" (the robust
accuracy is doubtful) or "not asked" (nothing was measured that could show a sign); see `STATES`.
"""
