"""Raw rows to packed, supervised examples, and the prepared dataset that training reads."""
