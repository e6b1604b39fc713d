"""How a person sees results: tables, files written whole, versions, figures. Imports nothing else of this package."""
