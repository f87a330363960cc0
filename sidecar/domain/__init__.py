"""Values and rules of token custody, without I/O. Everything here is immutable and knows no technology."""
