-- component: tables
-- purpose: leave nothing of a comparison of loads
-- variables: none
-- runs as: administrator
-- safe to repeat: yes
drop schema if exists memharbor_bench cascade;
