"""Model libraries at loramerge's service: the only place that imports them."""
