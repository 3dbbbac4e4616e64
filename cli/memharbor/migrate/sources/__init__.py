"""Places that memories are read from; each module has one of them and says what is true of it."""
