-- component: tables
-- purpose: drop the copies of a checkpoint
-- variables: copies
-- runs as: administrator
-- safe to repeat: drops only what is there
{% for copy in copies %}
drop table if exists memharbor_checkpoint.{{ copy | ident }};
{% endfor %}
