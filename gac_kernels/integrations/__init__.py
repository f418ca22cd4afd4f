"""The package inside trainers that people already have; each module imports its host only when it is used."""
