"""`make demo`: a vision-language model learns, from nothing and in minutes, to describe pictures of a small world."""
