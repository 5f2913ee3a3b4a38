"""How much does a token matter?"""
