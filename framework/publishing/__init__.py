"""job → envelope → the publish layers → the broker, confirmed."""
