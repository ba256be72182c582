"""A drafter, a loss and a policy for cosched, from outside its repository."""
