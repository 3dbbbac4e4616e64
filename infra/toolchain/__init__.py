"""
Get everything that Memharbor runs on: an engine, Python packages, Pulumi, its Docker plugin, images' raw material.

Each tool comes from the first of: on PATH and new enough; the official release, by version and checksum; a build from
package registries. `tools` decides, the other modules do. Nothing here may import a third-party package.
"""
