"""The nouns of the compiler (programs, problems, plans) and what prints them."""
