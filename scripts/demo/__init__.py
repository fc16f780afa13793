"""`make demo`: a vision-language model learns, from nothing and in minutes, to describe images of a small world."""
