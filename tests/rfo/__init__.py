# So that this folder's conftest is not mistaken for the one above.
