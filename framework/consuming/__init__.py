"""delivery → held → slot → the layers → the handler → ending → settled."""
