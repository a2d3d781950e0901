"""delivery → held → slot → middleware → handler → ending → settled."""
