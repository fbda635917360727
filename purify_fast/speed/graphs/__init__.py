"""Steps that are taken many times, captured once and replayed."""
