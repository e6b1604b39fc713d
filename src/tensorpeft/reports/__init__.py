"""How a person sees results: tables, files, versions, figures."""
