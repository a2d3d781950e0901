"""job → envelope → publishing middleware → broker, confirmed."""
