"""How ATen ops map roles to roles: one op family a file, found by listing this folder."""
