"""What a host is and how fast it is: memory, cores, flash; measured facts keep their origin."""
