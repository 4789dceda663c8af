"""Hidden states on their way between hosts: few outliers exact, the rest in the fewest bits."""
