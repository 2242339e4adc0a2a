"""Human agents: who they are, what they see, what they do. `desk` is the live part; read it first."""
