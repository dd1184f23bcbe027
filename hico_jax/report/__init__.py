"""A report is one HTML file that needs nothing else: `page.py` lays it out, `charts.py` draws.

In: results as plain JSON values. Out: `report.html`, readable offline, on a phone, in light and in dark.
"""
